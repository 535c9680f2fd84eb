"""Methods that compare examples instead of gradients: by what a layer makes of them, or as they are."""

from headwater.influence.similarity.representations import Representations

__all__ = ["Representations"]
