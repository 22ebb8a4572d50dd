"""Recipe for a folder of images, trained on pixels; its sub-folders are the classes."""

from gesso.config import DataConfig, EDMConfig, MMDiTppConfig, OptimConfig, RunConfig, SampleConfig, TrainConfig


def folder() -> RunConfig:
    """Train mmDiT++ on your own images at 32x32 pixels, or any multiple of net.patch_size.

    gesso train folder:/path/to/images data.resolution=32     hours on one GPU
    """
    return RunConfig(
        recipe="folder",
        data=DataConfig(source="", resolution=32, channels=3, flip=True),
        net=MMDiTppConfig(hidden_size=256, depth=6, num_heads=4, patch_size=4),
        process=EDMConfig(),
        optim=OptimConfig(lr=5e-4, schedule="inverse_sqrt", ref_images=500_000, warmup_images=10_000),
        train=TrainConfig(total_images=2_000_000, batch_size=64, snapshot_every=100_000, checkpoint_every=50_000),
        sample=SampleConfig(steps=32, guidance=1.5, sigma_rel=0.10),
    )
