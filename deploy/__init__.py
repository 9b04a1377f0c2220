"""How the services are deployed and watched: dashboards, rules, containers."""
