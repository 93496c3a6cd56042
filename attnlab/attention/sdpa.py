"""torch's scaled_dot_product_attention with ``enable_gqa``: as fast as the backend torch picks (see ``backend``).

flash and cuDNN share heads by themselves; the memory-efficient backend does not take ``enable_gqa``, and the math path
repeats K and V.
"""

from attnlab.attention.torch_sdpa import attend, backend

__all__ = ["attend", "backend"]
