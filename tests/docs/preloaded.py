"""What the commands of parco import, for the process from which those of page.py are forked."""

import transformers.models.llama.modeling_llama
import transformers.trainer

import parco.cli

__all__ = ["parco", "transformers"]
