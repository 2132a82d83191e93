"""What several test files use: tiny models, samples, pages. (No test file imports another.)"""
