"""The protocols of Podkeel, with the stubs generated from them."""
