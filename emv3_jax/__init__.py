"""EchoMimicV3 in JAX and Flax: one picture, one recording and a prompt become a talking video.

from emv3_jax import load_pipeline, Request
result = load_pipeline("demo").generate(Request(image="portrait.png", audio="voice.wav", prompt="A puppet nods."))
"""

import importlib
from typing import Any

__all__ = ["Request", "SamplingOptions", "UserError", "load_pipeline"]
_HOME = {"Request": "pipeline", "SamplingOptions": "pipeline", "load_pipeline": "pipeline", "UserError": "errors"}


def __getattr__(name: str) -> Any:
    # Imported when first asked for: `import emv3_jax` alone must not wait for JAX to start.
    if name in _HOME:
        return getattr(importlib.import_module(f"emv3_jax.{_HOME[name]}"), name)
    raise AttributeError(f"module 'emv3_jax' has no attribute {name!r}")
