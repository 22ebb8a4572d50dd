"""A folder of one's own images, in pixel space; the sub-folders are the classes."""

from gesso.config import EDM, Data, MMDiTpp, Optim, Run, Sample, Train


def folder() -> Run:
    """mmDiT++ on 32x32 pixels; any resolution that is a multiple of net.patch will do.

    gesso train folder:/path/to/images data.resolution=32
    """
    return Run(
        recipe="folder",
        data=Data(source="", resolution=32, channels=3, flip=True),
        net=MMDiTpp(width=256, depth=6, heads=4, patch=4),
        process=EDM(),
        optim=Optim(lr=5e-4, schedule="inverse_sqrt", ref_images=500_000, warmup_images=10_000),
        train=Train(total_images=2_000_000, batch_size=64, snapshot_images=100_000, state_images=50_000),
        sample=Sample(steps=32, guidance=1.5, sigma_rel=0.10),
    )
