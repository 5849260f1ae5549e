"""What a fusion can be asked for; imports nothing heavy."""

ATTENTIONS = ("op", "gather")
