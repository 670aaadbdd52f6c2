"""What a response is worth: the rule that reads its answer, and penalties added to the score."""
