DROP SEQUENCE rescind.fleet_questions;
DROP TABLE rescind.fleet_processes;
DROP TABLE rescind.gateways;
