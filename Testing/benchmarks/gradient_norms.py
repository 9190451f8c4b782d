"""How large the similarities' gradients are before the first step of the refinement, on real pairs.

    python Testing/benchmarks/gradient_norms.py ../shared/data

Root mean square, over the samples of a level, of the derivative of the loss' sum over samples with respect to a
sample's displacement in samples. If the weight of the regularity followed from the scale of a similarity, the weights
that were found best would go with these numbers.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from real_pairs import RealPair, pairs_of

from GradProjIOLib.registration.preprocessing import Guides, ImagePair, modality_of
from GradProjIOLib.registration.refinement import Refinement, plan_levels
from GradProjIOLib.settings import SIMILARITIES, Settings
from GradProjIOLib.spatial.maps import voxels_per_unit

NAMES = ("brain", "prostate 0", "prostate 1", "spine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=300_000)
    options = parser.parse_args()
    print("| pair | similarity | at each level, coarsest first |\n|---|---|---|")
    known, trunk = pairs_of(options.folder), options.folder / "body_ct.nii.gz"
    for name, pair in ({one: known[one] for one in NAMES} | {"trunk with itself": RealPair(trunk, trunk)}).items():
        fixed, moving = pair.images()
        for similarity in SIMILARITIES:
            settings = Settings(
                model="none",
                similarity=similarity,
                samples=options.samples,
                fixed_modality=modality_of(fixed),
                moving_modality=modality_of(moving),
            )
            images = ImagePair(fixed, moving, np.eye(4), settings, Guides())
            refinement = Refinement(images, torch.device("cpu"))
            norms = []
            for lattice in plan_levels(fixed, settings):
                objective = refinement.objective(lattice, None)
                _, gradients = objective.gradients(objective.fields(), None)
                per_sample = gradients[0][0] / voxels_per_unit(lattice).view(3, 1, 1, 1)
                norms.append((math.prod(lattice) * per_sample).norm(dim=1).square().mean().sqrt().item())
            print(f"| {name} | {similarity} |", ", ".join(f"{norm:.4f}" for norm in norms), "|", flush=True)


if __name__ == "__main__":
    main()
