"""What a person asked for, as values: nothing here acts, and nothing here knows ComfyUI."""
