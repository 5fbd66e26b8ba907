"""What is known about a program: axis rules, sites, token spaces, costs."""
