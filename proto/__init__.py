"""The protocols Podkeel speaks, with the stubs generated from them."""
