"""Random projections as values, for the methods that work in few dimensions: ``hw.Trak(projection=hw.projections.Gaussian(2048))``.

- :class:`Rademacher`: independent signs, the standard; :class:`Gaussian`: independent normals.
- :class:`SparseJL`: a few signs per coordinate: cheaper, with the same spread.
- :class:`Leading`: no random map but a layer's leading eigenvectors, for :class:`headwater.LoGra`.
- :class:`KhatriRao`: products of a sign per row and a sign per column: by far the cheapest for the layers of networks.

All are made by a counter-based generator: equal on every device, and a smaller dimension is the beginning of a larger one.
"""

from headwater.curvature.projected import Leading
from headwater.linalg.projections import Gaussian, Projection, Rademacher
from headwater.linalg.structured import KhatriRao, SparseJL

__all__ = ["Gaussian", "KhatriRao", "Leading", "Projection", "Rademacher", "SparseJL"]
