"""How good a model is: bits per character, exact match of answers, and how sure either one is."""
