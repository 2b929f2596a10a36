"""The playground: a trained model in a page (page.py, *.js), and moving pictures of it."""
