"""The memory plan, the budgets that follow from it, and what happens when memory runs out."""
