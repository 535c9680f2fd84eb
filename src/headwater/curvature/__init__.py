"""Estimating curvature from a task and data."""

from headwater.curvature.ekfac import EKFAC
from headwater.curvature.estimate import Blockwise, Curvature, Estimate, Joint, Point, Setting, Vectors
from headwater.curvature.products import GaussNewton
from headwater.curvature.small import Dense, Diagonal

__all__ = ["EKFAC", "Blockwise", "Curvature", "Dense", "Diagonal", "Estimate", "GaussNewton", "Joint", "Point", "Setting", "Vectors"]
