"""Drawn shapes: text to image and class to image on a laptop, where what is drawn can be read back exactly."""

from gesso.config import EDM, Data, Eval, MMDiTpp, Optim, Run, Sample, Semantic, Train


def shapes() -> Run:
    """mmDiT++ on 32x32 drawings of one or two shapes, from captions such as "a red star to the left of a blue ring".

    gesso train shapes            minutes on two CPU cores; after 30k images 94 % of colours are right and 97 % of the sides
                                  of single shapes, kinds and the relations of two take longer
    gesso train shapes data.resolution=64 process.scale=2      the same at 64x64, about five times the work
    gesso sample runs/shapes --prompt "a red star to the left of a blue ring"
    """
    return Run(
        recipe="shapes",
        data=Data(source="shapes", resolution=32, channels=3),  # never mirrored: captions say left and right
        net=MMDiTpp(width=128, depth=4, heads=4, patch=4),
        # Where shapes stand is decided at high noise: at CONFIG B's P_mean -.4 they fall to pieces (docs/log.md).
        process=EDM(P_mean=0.8, P_std=1.2, sigma_min=0.01, sigma_max=40),
        semantic=Semantic(kind="text", tokens=16, padding="noisy"),
        optim=Optim(lr=1e-3, betas=(0.9, 0.99), schedule="inverse_sqrt", ref_images=40_000, warmup_images=2_000),
        train=Train(total_images=60_000, batch_size=16, snapshot_images=5_000, state_images=5_000),
        sample=Sample(sampler="euler", steps=20, guidance=2.0, sigma_rel=0.075),
        eval=Eval(features="shapes"),
    )


def shapes_class() -> Run:
    """mmDiT++ on 32x32 drawings of one shape, whose kind is the class.

    gesso train shapes-class      minutes on two CPU cores
    """
    run = shapes()
    data = run.data.model_copy(update={"source": "shapes-class"})
    return run.model_copy(update={"recipe": "shapes-class", "data": data, "semantic": Semantic()})


RECIPES = {"shapes": shapes, "shapes-class": shapes_class}
