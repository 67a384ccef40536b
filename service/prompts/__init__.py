"""Prompts: a layout and texts become token ids and label ids. The door is `builder.PromptBuilder`."""
