"""One decoder for the Llama, Mistral, Qwen and Gemma families."""
