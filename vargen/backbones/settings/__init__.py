"""What constructors of backbones take: checks of arguments, and rules over several."""
