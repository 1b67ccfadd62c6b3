# SPDX-License-Identifier: Apache-2.0
"""The colours, markers and lines of every figure of this project."""

#: Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, RED, GREEN, PURPLE, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"
SKY, ORANGE, GREY, LIGHT_GREY = "#56B4E9", "#E69F00", "#777777", "#999999"
#: For series without a colour of their own, in this order.
COLOURS = (BLUE, RED, GREEN, PURPLE, BLACK, SKY, ORANGE, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
