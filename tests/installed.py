"""Run by an interpreter that gam_fused was installed for, outside the source tree: is it whole? Not a test module.

``--cuda``: with CUDA kernels; ``--pure``: without native kernels.
"""

import json
import sys
from pathlib import Path

import torch

import gam_fused
from gam_fused.kernels import available, extension

OPERATORS = [
    *("l2_norm", "l2_norm_pair", "difference_norm", "projection", "perturb_", "shift_", "restore_", "combine_"),
    *("decompose_", "sgd_step_", "adamw_step_"),
]

reason, info = extension.unavailable_reason(), extension.build_info()
print(json.dumps({"package": gam_fused.__file__, "torch": torch.__version__, "reason": reason, "build_info": info}))
if "--pure" in sys.argv:
    assert reason is not None
    assert info is None
    assert available()["native"] == reason
else:
    from gam_fused import _C

    assert reason is None, reason
    assert available()["native"] is None
    assert _C.build_info()["version"] == gam_fused.__version__
    assert extension.direct_unavailable_reason() is None, extension.direct_unavailable_reason()
    assert set(extension.direct_calls()) == set(OPERATORS)
    assert Path(_C.__file__).parent == Path(gam_fused.__file__).parent
    for name in OPERATORS:
        schema = torch._C._get_schema(f"gam_fused::{name}", "")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "CPU"), name
        if "--cuda" in sys.argv:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "CUDA"), name
    assert torch.ops.gam_fused.l2_norm([torch.tensor([3.0, 4.0])]) == 5
if "--cuda" in sys.argv:
    assert extension.cuda_unavailable_reason() is None, extension.cuda_unavailable_reason()
    assert info["cuda"]

model = torch.nn.Linear(3, 1)
before = model.weight.detach().clone()
data, target = torch.ones(2, 3), torch.zeros(2, 1)
backend = "foreach" if "--pure" in sys.argv else "native"
optimizer = gam_fused.GAM(
    model.parameters(), torch.optim.SGD, rho=0.1, alpha=0.3, lr=0.1, momentum=0.9, backend=backend
)
loss = optimizer.step(lambda: torch.nn.functional.mse_loss(model(data), target))
assert loss.isfinite()
assert not torch.equal(model.weight, before)
