"""The search for transferable profiles: environment, evaluation, ledger, agents and campaign."""
