"""How good a model is: bits per character of text, exact match of answers, and how sure either
number is."""
