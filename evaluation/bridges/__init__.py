"""Other programs that look at kept answers: Evidently and promptfoo, each in an environment of its own."""
