"""For plugin authors: checks that a part keeps the contract, and small real models to try it on.

``pytest -p arctic_plugins.testing.fixtures`` adds the fixtures; :func:`check_codec` needs torch, :func:`tiny_llama` transformers.
"""

from arctic_plugins.testing.codecs import check_codec
from arctic_plugins.testing.models import tiny_llama

__all__ = ["check_codec", "tiny_llama"]
