"""Operations: the command line, the embedded server, importers and verification.  Imported by nobody."""
