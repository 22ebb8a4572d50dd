"""scikit-learn's handwritten digits: 1,797 real 8x8 scans in ten classes, on a laptop, without download."""

from gesso.config import EDM, EDM2, Data, Eval, Loss, MMDiTpp, Optim, Run, Sample, Train


def digits() -> Run:
    """mmDiT++ (0.8 M parameters) on the digits.

    gesso train digits            2-3 minutes on two CPU cores
    """
    return Run(
        recipe="digits",
        data=Data(source="digits", resolution=8, channels=1),
        net=MMDiTpp(width=96, depth=4, heads=3, patch=2),
        process=EDM(sigma_min=0.01, sigma_max=40),  # 8-bit pixels show nothing below .01
        loss=Loss(label_dropout=0.1),
        optim=Optim(lr=2e-3, betas=(0.9, 0.99), schedule="inverse_sqrt", ref_images=100_000, warmup_images=2_000),
        train=Train(total_images=160_000, batch_size=128, snapshot_images=16_000, state_images=16_000),
        sample=Sample(sampler="euler", steps=20, guidance=1.5, sigma_rel=0.075),
        eval=Eval(features="digits"),
    )


def digits_edm2() -> Run:
    """EDM2's CONFIG G with two levels on the digits, with its uncertainty weighting and schedule.

    gesso train digits-edm2       about 3 minutes on two CPU cores
    """
    run = digits()
    return run.model_copy(
        update=dict(
            recipe="digits-edm2",
            net=EDM2(channels=32, multipliers=(1, 2), blocks=1, attention_levels=(1,), channels_per_head=32),
            loss=Loss(weighting="uncertainty", label_dropout=0.1),
            optim=Optim(lr=1e-2, betas=(0.9, 0.99), schedule="inverse_sqrt", ref_images=50_000, warmup_images=2_000),
            train=Train(total_images=120_000, batch_size=128, snapshot_images=12_000, state_images=12_000),
        )
    )
