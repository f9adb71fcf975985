"""What every script needs and no reader of an algorithm does; it knows no algorithm."""
