"""What a fusion can be asked for; imports nothing heavy."""

ATTENTIONS = ("op", "gather")
OPSET = 16  # of standard operators, at least: `Shape` with an end, GridSample
