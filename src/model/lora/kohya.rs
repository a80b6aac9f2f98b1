//! Names and layout of kohya's and ComfyUI's LoRA files.
