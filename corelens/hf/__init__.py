"""What CoreLens touches of transformers, accelerate and TransformerLens beyond their documented
calls.

These parts change without notice. Each has a sentence that says why it is needed, and
`tests/test_hf.py` fails with its name when it goes away. No file outside this room touches them.
Beside them stands the range of versions that the tests ran on.
"""

from corelens.hf.attention import (
    attention_functions,
    attention_name,
    attention_named,
    attention_set,
    every_attention,
    forget_attention,
    looks_attention_up,
    set_attention_name,
)
from corelens.hf.configs import revision_of, source_of
from corelens.hf.kv_cache import (
    CACHE_ARGUMENTS,
    cache_argument,
    cache_in,
    cache_of,
    cache_windows,
    cached_tensors,
    unknown_caches,
)
from corelens.hf.modules import (
    checkpointing_off,
    execution_device,
    offloaded,
    replaced_forward,
    takes_argument,
    tied_parameters,
)
from corelens.hf.silence import attention_off, silent
from corelens.hf.transformer_lens import (
    FactoredMatrix,
    HookedRootModule,
    LensCache,
    LensHookPoint,
    Slice,
    attach_order,
    newest_handle,
)
from corelens.hf.versions import TESTED, untested, warn_if_untested
from corelens.hf.vision import (
    ENCODED,
    deepstack_addition,
    image_defaults,
    set_visual_features,
    takes_encoded,
    visual_features,
)

__all__ = [
    "CACHE_ARGUMENTS",
    "ENCODED",
    "TESTED",
    "FactoredMatrix",
    "HookedRootModule",
    "LensCache",
    "LensHookPoint",
    "Slice",
    "attach_order",
    "attention_functions",
    "attention_name",
    "attention_named",
    "attention_off",
    "attention_set",
    "cache_argument",
    "cache_in",
    "cache_of",
    "cache_windows",
    "cached_tensors",
    "checkpointing_off",
    "deepstack_addition",
    "every_attention",
    "execution_device",
    "forget_attention",
    "image_defaults",
    "looks_attention_up",
    "newest_handle",
    "offloaded",
    "replaced_forward",
    "revision_of",
    "set_attention_name",
    "set_visual_features",
    "silent",
    "source_of",
    "takes_argument",
    "takes_encoded",
    "tied_parameters",
    "unknown_caches",
    "untested",
    "visual_features",
    "warn_if_untested",
]
