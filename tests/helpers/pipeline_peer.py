"""Load exported pipelines in a process that cannot import gesso, and save their images.

Usage: python pipeline_peer.py JOBS, a JSON list of {"folder", "seeds", "arguments", "result"}.
"""

import importlib.abc
import json
import sys
import warnings


class GessoIsMissing(importlib.abc.MetaPathFinder):
    """Importer that refuses gesso."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == "gesso":
            raise ImportError("gesso is not installed in this test")


def main() -> None:
    sys.meta_path.insert(0, GessoIsMissing())
    import torch
    from diffusers import DiffusionPipeline
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    for job in jobs:
        pipeline = DiffusionPipeline.from_pretrained(job["folder"], trust_remote_code=True)
        pipeline.set_progress_bar_config(disable=True)
        arguments = job["arguments"] | {"seeds": job["seeds"]}
        images = {kind: pipeline(output_type=kind, **arguments).images.contiguous() for kind in ("latent", "pt")}
        arrays = [torch.tensor(list(image.tobytes()), dtype=torch.uint8) for image in pipeline(**arguments).images]
        save_file({**images, "bytes": torch.stack(arrays)}, job["result"])
    assert "gesso" not in sys.modules


main()
