"""What rows of fine-tuning data say of each token beside its id: bits of a byte, kept in `<prefix>_marks.bin/.idx`."""

LEARNT = 1  # predicting it counts in the loss
BEGINS = 2  # a document (a conversation, a rollout) begins with it
JUDGED = 4  # a verdict is known on the text up to it …
SOLVED = 8  # … and is that it leads to a solution
SUFFIX = "_marks"  # what the prefix of the marks has behind that of the tokens
