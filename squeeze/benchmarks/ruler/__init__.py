"""RULER (Hsieh et al., arXiv 2404.06654): long prompts that are made, for any tokenizer and length."""
