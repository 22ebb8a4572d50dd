"""Recipes for drawn shapes: text-to-image and class-conditional models for a laptop, with exact evaluation."""

from gesso.config import (
    DataConfig,
    EDMConfig,
    EvalConfig,
    MMDiTppConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    SemanticConfig,
    TrainConfig,
)


def shapes() -> RunConfig:
    """Train text-to-image mmDiT++ on 32x32 drawings, with captions such as "a red star to the left of a blue ring".

    gesso train shapes            minutes on two CPU cores
    gesso train shapes data.resolution=64 process.resolution_scale=2      at 64x64, about five times the cost
    gesso sample runs/shapes --prompt "a red star to the left of a blue ring"

    After 30k images 94 % of the colours are right, and 97 % of the positions of single shapes. Shape kinds and
    relations of two shapes take longer.
    """
    return RunConfig(
        recipe="shapes",
        data=DataConfig(source="shapes", resolution=32, channels=3),  # no flip: captions contain left and right
        net=MMDiTppConfig(hidden_size=128, depth=4, num_heads=4, patch_size=4),
        # Positions are decided at high noise; with CONFIG B's P_mean=-0.4 shapes break up (docs/decisions.md).
        process=EDMConfig(P_mean=0.8, P_std=1.2, sigma_min=0.01, sigma_max=40),
        semantic=SemanticConfig(kind="text", max_tokens=16, padding="noisy"),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.99), schedule="inverse_sqrt", ref_images=40_000, warmup_images=2_000),
        train=TrainConfig(total_images=60_000, batch_size=16, snapshot_every=5_000, checkpoint_every=5_000),
        sample=SampleConfig(sampler="euler", steps=20, guidance=2.0, sigma_rel=0.075),
        eval=EvalConfig(toy_metrics="shapes"),
    )


def shapes_class() -> RunConfig:
    """Train class-conditional mmDiT++ on 32x32 drawings of one shape; the class is its kind.

    gesso train shapes-class      minutes on two CPU cores
    """
    run = shapes()
    data = run.data.model_copy(update={"source": "shapes-class"})
    return run.model_copy(update={"recipe": "shapes-class", "data": data, "semantic": SemanticConfig()})


RECIPES = {"shapes": shapes, "shapes-class": shapes_class}
