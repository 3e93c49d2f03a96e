"""Methods of other papers, one file each, registered under their names."""
