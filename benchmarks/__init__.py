"""What the package costs, beside torch by hand and beside other packages."""
