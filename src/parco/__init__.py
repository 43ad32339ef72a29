"""parco makes a transformer cheaper on this machine, and says what each way costs."""

import torch as torch  # before parco._C: the extension then shares the libgomp that torch has loaded

__version__ = "0.1.0"
