"""`python -m lora_forensics`."""

from lora_forensics.cli import main

if __name__ == "__main__":
    main()
