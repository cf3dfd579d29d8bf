"""Two lines for a training loop of another library: posteriors for Lightning and Hugging Face, and records for TensorBoard.

Each module needs its own library: `laplace_ws.callbacks.lightning` needs `lightning` or `pytorch_lightning`,
`laplace_ws.callbacks.huggingface` needs `transformers`; `laplace_ws.callbacks.tensorboard` takes any writer with `add_scalar`.
"""

from __future__ import annotations
