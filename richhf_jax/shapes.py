"""Arrays in annotations, as in `Float[Array, "batch length embed"]`: kind of number, type, named axes.

jaxtyping defines the notation. The tests check every call against it; outside tests it costs nothing.

Axes have the same names everywhere:

- `batch` images, `prompts` of an image, `sequences` being decoded (`batch` times the decodes of each);
- `height`, `width`, `channels` (or `filters`) of an image or a feature map; `rows`, `columns` of patches;
- `side` of the model's square image, in pixels;
- `length` in tokens, `target_length` of the decoder's text, `patches` and `image_tokens` of an image;
- `embed`, `mlp`, `heads`, `kv` (the width of one head), `vocab`, which are logical axes of parameters, too;
- `heatmaps`, `scores`, `texts`: outputs of each kind; `slots`: outputs of any one kind.
"""

import jax
import numpy as np

# NumPy's arrays are welcome wherever jax.numpy takes them.
Array = jax.Array | np.ndarray
