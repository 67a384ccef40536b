"""Prompts: templates and texts become token ids with label ids. The door is `builder.PromptBuilder`."""
