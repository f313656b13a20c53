"""One call of ComfyUI's model: its rows, its blocks, and how both are changed for its length."""
