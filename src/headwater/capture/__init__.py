"""Per-example gradients of any module."""

from headwater.capture.blocks import Block, BlockGradient, Lookup, Outer, Rows
from headwater.capture.capture import Capture, Gradients
from headwater.capture.rules import RULES, Rule, rule_of

__all__ = ["RULES", "Block", "BlockGradient", "Capture", "Gradients", "Lookup", "Outer", "Rows", "Rule", "rule_of"]
