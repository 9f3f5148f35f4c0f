"""Bounds of comparisons that more than one test uses, and where each comes from.

Sums in another order, fused multiplications and another width of the vector unit change the last
digits of every result. A bound is therefore derived from the arithmetic, or is at least twice what
was measured; where rounding errors grow, the growth is part of it.
"""

# One rounding to float32 is at most half of this, relative to the result.
EPS = 2.0**-23

# One rounding to bfloat16, relative to the result.
BFLOAT16 = 2.0**-9

# Levels of 255 between two uint8 images whose float pixels differ by rounding alone: a value half
# way between two levels falls to either side.
ROUNDED = 1
