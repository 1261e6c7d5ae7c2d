"""Other frameworks, each imported only when it is used."""
