"""Dense attention: prompts, and layers that decode densely."""
