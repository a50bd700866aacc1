"""The colours of figures and player: each differs from its neighbours in lightness too, so that grey prints tell them.

``player.css`` names the same blue, amber and grey.
"""

BLUE = "#0b6fa4"
"""T3, and whatever stands first."""
AMBER = "#c58b00"
"""S3Gen, and whatever stands second."""
RUST = "#7a2e12"
"""What is released, where a third colour is needed."""
SKY = "#2a86bd"
PALE = "#9fcbe3"
SAND = "#f2d39a"
GREY = "#9a9a9a"
"""The watermark."""
SEAM = "#b3400e"
"""Seams, and marks on a heat map."""
