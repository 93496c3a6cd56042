"""What sharing heads should cost: bytes and seconds from a shape, before anything is allocated or run."""
