"""What a finished model is worth: held-out perplexity, agreement with its teacher, benchmark tasks, masked neurons."""
